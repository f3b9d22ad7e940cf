"""Turn published rows into segments and base generations: encode, merge and write chunks."""
