"""What may be answered from memory, and what is kept."""
