"""Typical wrong answers to the exercises: {number: [(answer, words that its mark must say)]}."""
