"""Networks of members: conversion, deep ensembles, and how they run."""
