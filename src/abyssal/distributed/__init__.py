"""A model on many processes: applied from outside, so that model/ knows of none."""
