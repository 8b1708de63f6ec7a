"""From encoder output to words: searches, word error rates and the records that reports are made from."""
