"""Local training: the one loop, its phases, and the step that is captured and replayed."""
