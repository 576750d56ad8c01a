"""What a run measures, records and shows. Nothing here changes what is trained."""
