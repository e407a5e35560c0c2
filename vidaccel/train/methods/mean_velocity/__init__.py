"""Mean velocity over short intervals (Restricted MeanFlow; method.md, section 2), by one of several targets."""
