"""Measures of a film that need no network: what it shows, how steadily, and how near it is to another film.

Everything here is numpy. Measures over time take frames one by one, so a film of any length fits.
"""
