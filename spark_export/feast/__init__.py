"""Convert the definitions of a Feast repository to a views.yaml."""
