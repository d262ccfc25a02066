"""What measures speed; never part of the tests."""
