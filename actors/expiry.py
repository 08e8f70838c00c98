"""The actor that removes keys whose deadline has passed."""
