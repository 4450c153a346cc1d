// Compiles what follows for the instruction set GPLQ_TARGET, a string such as "avx2,fma". It
// comes after the system headers, so that their inline functions stay at the baseline.
#define GPLQ_PRAGMA_TEXT(text) _Pragma(#text)
#define GPLQ_PRAGMA(text) GPLQ_PRAGMA_TEXT(text)
#if defined(__clang__)
GPLQ_PRAGMA(clang attribute push(__attribute__((target(GPLQ_TARGET))), apply_to = function))
#else
#pragma GCC push_options
GPLQ_PRAGMA(GCC target(GPLQ_TARGET))
#endif
