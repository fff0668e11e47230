"""What a step on a TPU pod will take: its time by a walk over the compiled program, and what that costs."""
