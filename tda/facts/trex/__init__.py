"""The T-REx facts and sentences of the authors' public release."""
