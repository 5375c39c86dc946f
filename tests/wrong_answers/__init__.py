"""Typical wrong answers to the exercises, {number: [(answer, words that the mark must say), ...]}."""
