"""For those who bring their own training loop, or Hugging Face's Trainer; docs/library.md shows how."""
