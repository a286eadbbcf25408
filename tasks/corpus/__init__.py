"""Verb: text into tokens to pretrain on."""
