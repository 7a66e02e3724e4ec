"""What several test files share: models, measures and made-up data."""
