/* Marks what the library offers to Python; all else is hidden. */
#ifndef BNKIT_EXPORT_H
#define BNKIT_EXPORT_H

#define EXPORT __attribute__((visibility("default")))

#endif
