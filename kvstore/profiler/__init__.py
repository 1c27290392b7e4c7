"""From a model and some text to a Pareto set of compression profiles over ratio, speed and quality."""
