"""Pure functions that conditions are made of: coordinates, pictures, layouts; orders of codes."""
