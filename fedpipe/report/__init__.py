"""What a person sees of a study: results read back, tables, figures, the page, the terminal."""
