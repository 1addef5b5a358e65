"""Commands that measure, judge and estimate."""
