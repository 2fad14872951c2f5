"""The report: results put together, sentences, figures, the page. Takes what the stages have found."""
