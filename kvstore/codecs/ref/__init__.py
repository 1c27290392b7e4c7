"""Reference arithmetic of the stages in plain torch: slow where that is clearer, and what every kernel must equal."""
