"""What a compiled step will do: its memory, and its collectives beside the fewest bytes that they could move."""
