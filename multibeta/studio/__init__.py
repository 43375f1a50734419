"""The studio: a page on which a person moves beta, directions and paths, and sees at once what a model makes of it."""
