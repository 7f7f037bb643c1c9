"""Hashed table look-ups: `lookup.lookup` is the op, `score` its maths, the other files serve it."""
