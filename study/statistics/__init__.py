"""From kept rows to a verdict: observations, resampling over seeds and documents, effects, the decision rule."""
