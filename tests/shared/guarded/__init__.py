"""What CI guards without a clock: counts that a change may alter only when somebody accepts it. See docs/guard.md."""
