"""The embedded corpus: real facts about countries and cities, stated by templates."""
