"""The pages of the project, and what writes their generated parts: `python -m docs.render`."""
