"""What numbers can be told apart: resampled intervals, paired tests, agreement of raters, strengths from votes."""
