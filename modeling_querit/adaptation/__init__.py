"""Label-free adaptation: queries for documents, candidates, teachers' scores, training; `querit adapt`."""
