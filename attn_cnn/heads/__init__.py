"""What each head does, in numbers, and parameters with heads pruned, reset or frozen; the command is in __main__.py."""
