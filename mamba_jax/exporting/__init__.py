"""Trained models in the formats of other engines, one file per format."""
