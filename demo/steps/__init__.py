"""The steps of the demo, as `demo.story` runs them. Each step prints its results and measurements."""
