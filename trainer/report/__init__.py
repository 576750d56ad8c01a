"""Pages and pictures made of a finished or running run's records. Nothing here reads a model or trains."""
