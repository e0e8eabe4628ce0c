"""Comparisons: the arms that values span, trained alike, measured, and told apart from noise."""
