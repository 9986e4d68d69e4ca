"""A study: one file from text to verdict. Models, variants, seeds, outcomes, margins and the rule come before it."""
