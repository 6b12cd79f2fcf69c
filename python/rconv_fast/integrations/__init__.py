"""Audits inside other frameworks: `rconv_fast.integrations.flower`, `rconv_fast.integrations.opacus`."""
