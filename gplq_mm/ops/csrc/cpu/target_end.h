// Ends what target_begin.h began.
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef GPLQ_PRAGMA_TEXT
#undef GPLQ_PRAGMA
