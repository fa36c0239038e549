"""The service layer over HTTP: routes, requests read, answers written. Thin."""
