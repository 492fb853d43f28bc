"""The small story-telling model that ships with the package, its draft model, and the recipe that trains both."""
