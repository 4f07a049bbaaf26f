// A page opened from a folder may not read other pages, so there the search shows titles without excerpts.
if (location.protocol === "file:" && typeof DOCUMENTATION_OPTIONS !== "undefined")
  DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;
// Sphinx has no Chinese for this yet; unsaid, the number of pages found would be missing.
Documentation.TRANSLATIONS["Search finished, found one page matching the search query."] = ["找到 ${resultCount} 頁。"];
