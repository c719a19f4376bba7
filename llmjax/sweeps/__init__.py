"""`llmjax sweep`: many trials of a sweep file, side by side or elsewhere, and what comes of them."""
