"""What a person sees of the data before a run: `doctor`, and samples in the terminal or as a page."""
