"""One file per run; its docstring says command, cost and expected numbers."""
