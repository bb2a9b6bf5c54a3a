"""What holds for all tests."""

from hypothesis import settings

# A busy machine must not fail a test that is right.
settings.register_profile("longvid", deadline=None)
settings.load_profile("longvid")
