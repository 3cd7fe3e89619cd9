"""Looking into a model: heads, experts, attention maps, ablations, histograms, and the time line of a step."""
