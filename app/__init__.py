"""Student against experts: a page that draws one prompt with any of a family's models from the same noise."""
