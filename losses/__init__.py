"""Losses over token vectors and masks: values that know no model."""
