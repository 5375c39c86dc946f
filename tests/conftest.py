"""Shared by all tests: hypothesis runs the same examples every time."""

import hypothesis

hypothesis.settings.register_profile("suite", deadline=None, derandomize=True, max_examples=60)
hypothesis.settings.load_profile("suite")
